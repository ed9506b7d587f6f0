"""What a dataset holds, as rows: their fields, and the forms in which people have them."""
