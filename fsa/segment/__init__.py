"""From a picture and class names to labels."""
