"""Side by side with the peers, and the demo."""
