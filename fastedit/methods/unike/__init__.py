"""UniKE: intrinsic and external knowledge as key-value memories."""
