"""In a checkout, the folder `controllers` beside `warp_phys`; a wheel has that folder itself in this place."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from controllers import *  # noqa: F403
else:
    from warp_phys.checkout import stand_in

    stand_in(__name__)
