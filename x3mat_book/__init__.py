"""What only the chapters of the book need; x3mat itself imports nothing from here."""
