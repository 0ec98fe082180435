"""One model: how it is cut over the mesh, walked forwards and backwards, and stepped."""
