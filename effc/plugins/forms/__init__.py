"""What attention can be replaced by: definitions, text forms and costs, in numpy and plain Python."""
