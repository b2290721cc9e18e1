"""Interfaces of other packages over this one, so that a script that was written for them changes one import."""
