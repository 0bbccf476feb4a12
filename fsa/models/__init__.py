"""CLIP models: their vision towers, their text, the models that guide ProxyCLIP, and loading."""
