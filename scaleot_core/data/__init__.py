"""What the stages read: the embedded model and questions, your own or the hub's, and the public corpus."""
