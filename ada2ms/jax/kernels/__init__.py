"""The kernel of a leaf: from gradient, moments and parameter to update and new moments."""
