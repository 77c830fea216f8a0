"""Any stock decoder of transformers, walked on packed rows through its own forward."""
