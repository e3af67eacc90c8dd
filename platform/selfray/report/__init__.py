"""Pictures, charts and the comparison page."""
