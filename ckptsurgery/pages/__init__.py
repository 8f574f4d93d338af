"""Pages: one HTML file that shows a plan, a comparison or a checkpoint, and needs nothing else to be read.

`trees` makes the rows of a foldable tree, `pictures` the boxes of an axis diagram, and `page` puts data, styles and
script into one file. The caller decides which facts a row has.
"""
