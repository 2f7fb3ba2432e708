"""A demonstration on real images: `python -m sokd.demo` (needs `pip install 'sokd[demo]'`)."""
