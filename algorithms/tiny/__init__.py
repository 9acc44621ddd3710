"""A small decoder model of Python's documentation, and the text and the program that train it.

``corpus`` reads its text from the running interpreter's standard library, so nothing needs to be downloaded;
``train`` writes the folder ``model`` beside this file, in Hugging Face format.
"""
