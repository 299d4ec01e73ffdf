"""What a run keeps (``log``), prints (``terminal``) and draws (``page``)."""
