"""What happens in a step, and from step to step."""
