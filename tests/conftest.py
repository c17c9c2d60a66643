"""Nothing here but what every test needs: the repository on the path, warnings of Megatron's imports silenced."""
