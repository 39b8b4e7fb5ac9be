"""The paper's method, one file a term: harmonizer, layer importance, DLR, rank compression, the emulator."""
