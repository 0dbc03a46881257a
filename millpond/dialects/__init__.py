"""How families of models write thoughts and calls of tools, and what is read from their answers."""
