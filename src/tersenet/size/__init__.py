"""Steps that make the coded file small: grids and zeros by what they cost and what they hurt, and shared values."""
