"""``mmmoe-data inspect``: what data holds, as a table, a contact sheet and a page that shows and plays samples."""
