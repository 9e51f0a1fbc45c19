"""Pictures with labels for each pixel or object, read from the formats people have them in."""
