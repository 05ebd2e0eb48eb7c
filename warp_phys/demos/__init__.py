"""In a checkout, the folder `demos` beside `warp_phys`; a wheel has that folder itself in this place."""

from warp_phys.checkout import stand_in

stand_in(__name__)
