"""The data owner's side: what is learnt from its records, how it is trained, and how they are kept private."""
