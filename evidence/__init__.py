"""``make evidence``: runs that show what sparse experts gain, their records, and the page made of them."""
