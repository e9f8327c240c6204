def unavailable(): return "not written"
def set_num_threads(n): pass
