"""What comes out: marks, tables and plots made from committed results."""
