"""A model in one file: which parts it holds, and the folder that it is converted to."""
