"""Representations of several modalities: one file a kind (the table is ``kinds.REPRESENTATIONS``)."""
