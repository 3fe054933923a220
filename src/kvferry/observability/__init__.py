"""What kvferry says and counts about itself. Knows nothing of what is measured."""
