"""Reports: `scan` makes one, `terminal` prints it, `html` writes it as a page, `figures` draws what is on that page."""
