"""The data owner's own records: from a file of whatever form to the tokens that a model sees when it is used."""
