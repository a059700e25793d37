"""What makes the golden vectors of `ada2ms.core.golden`: cases, an oracle of 50 digits, and what writes the files.

    python -m tests.golden --check    makes them again, compares byte for byte, verifies the checksums
    python -m tests.golden --write    makes them again and replaces them

Both need mpmath (the extra `dev`), and are run in the root of the repository.
"""
