"""The numerical side: the page format and the operators over it."""
