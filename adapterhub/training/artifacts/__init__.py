"""Files that a training writes."""
