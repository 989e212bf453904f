"""What an update passes on its way: error feedback, a codec, the wire format, validation.

client   delta -> feed (feedback.py) -> codec (codecs/) -> encode (codec.py) -> network
server   network -> read_npy (npy.py) -> decode (codec.py) -> Update -> aggregation
"""
