"""The path of an update: error feedback, a codec, the message format, validation.

client   delta -> feed (feedback.py) -> codec (codecs/) -> encode (wire.py) -> network
server   network -> read_npy (npy.py) -> decode (wire.py) -> Update -> aggregation
"""
