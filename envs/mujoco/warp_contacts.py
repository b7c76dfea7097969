"""A mended function of MuJoCo Warp 4.0: contacts of capsules with planes, whose friction has MuJoCo's tangents.

MuJoCo takes the capsule's axis as the first tangent, however upright it stands. MuJoCo Warp does so only where the axis
is more than 30 degrees off the plane's normal, and else takes a fixed one; since friction's pyramids are not round,
Ant's steps then differ by more than rounding.
"""

from __future__ import annotations

import mujoco_warp._src.collision_primitive as primitive
import mujoco_warp._src.collision_primitive_core as core
import warp
from mujoco_warp._src.collision_primitive_core import mat23f

original = core.plane_capsule


@warp.func
def plane_capsule(
    plane_normal: warp.vec3,
    plane_pos: warp.vec3,
    capsule_pos: warp.vec3,
    capsule_axis: warp.vec3,
    capsule_radius: float,
    capsule_half_length: float,
) -> tuple[warp.vec2, mat23f, warp.mat33]:
    """Do as MuJoCo Warp's own; see above."""
    n = plane_normal
    dist, pos, frame = original(n, plane_pos, capsule_pos, capsule_axis, capsule_radius, capsule_half_length)
    b = capsule_axis - n * warp.dot(n, capsule_axis)
    if warp.length(b) > 1e-6:
        b = warp.normalize(b)
        c = warp.cross(n, b)
        frame = warp.mat33(n[0], n[1], n[2], b[0], b[1], b[2], c[0], c[1], c[2])
    return dist, pos, frame


def mend() -> None:
    """Put it in place, before kernels are compiled."""
    primitive.plane_capsule = plane_capsule
