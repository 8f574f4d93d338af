"""What is wrong with a checkpoint, and what to do about it: `folder_findings` look at files, `findings` at headers,
`values` at every element, `doctor` asks them all.
"""
