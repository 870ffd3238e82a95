"""The Hugging Face Hub, and what answers like it."""
