"""Who answers questions, one file each; every one yields traces of one schema."""
