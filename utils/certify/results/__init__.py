"""What comes out of long calls: how far they are, and their results in other forms."""
