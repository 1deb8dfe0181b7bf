"""The JSON that goes in and out, a module for each kind of resource.

Recipes are duquant.config's own dataclasses, so there is one description of them.
"""
