import math


def outside(sigma: float, length: int, low: float, high: float) -> float:
    deviation = sigma / math.sqrt(length)
    below, above = (math.erf(edge / deviation / math.sqrt(2)) / 2 for edge in (math.log1p(-low), math.log1p(high)))
    return 1 - (above - below)


def length_needed(sigma: float, low: float, high: float, share: float) -> int:
    least, enough = 0, 1
    while outside(sigma, enough, low, high) > share:
        least, enough = enough, 2 * enough
    while enough - least > 1:
        middle = (least + enough) // 2
        least, enough = (middle, enough) if outside(sigma, middle, low, high) > share else (least, middle)
    return enough
