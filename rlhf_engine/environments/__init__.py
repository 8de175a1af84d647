"""What the model talks to between its turns: found, run in processes of their own, and the built-in ones."""
