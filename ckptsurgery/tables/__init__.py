"""Plain text in columns: tables, trees of folded keys, and the sums that stand in them."""
