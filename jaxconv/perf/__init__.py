"""What a program costs and how fast a chip could run it, worked out without the chip."""
