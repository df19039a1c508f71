"""An OpenFOAM case around one body: written, meshed and solved with the package's own programs.

Ground and wind move together past a standing body, as in a tunnel with a moving belt; the other walls slip. The mesh is
blockMesh's box, refined towards the body by snappyHexMesh; simpleFoam (SIMPLEC, k-omega SST, wall functions) starts
from the undisturbed wind and stops when its residuals are small or its iterations used up. (From potentialFoam's flow
it diverged.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import bodies
import numpy as np
from bodies import Body
from numpy.typing import NDArray

PROGRAMS = ("blockMesh", "snappyHexMesh", "simpleFoam")
# Where Debian keeps what other installations name in the environment.
DEBIAN_PROJECT_DIR = "/usr/share/openfoam"
# The tunnel: x, y and z in metres, with the ground at z = 0.
TUNNEL = ((-2.0, 4.0), (-1.2, 1.2), (0.0, 1.2))
NU = 1.5e-5
TURBULENCE_INTENSITY = 0.01
TURBULENCE_LENGTH = 0.03
# Closest box of refinement, around body and near wake.
NEAR_BOX = ((-0.9, -0.45, 0.0), (1.5, 0.45, 0.55))


@dataclass(frozen=True)
class Resolution:
    """How finely a case is meshed, and how long it is solved.

    Args:
        cell: Edge of the coarsest cells in metres.
        surface_level: Halvings of that edge at the body.
        box_level: Halvings in the box around body and near wake.
        iterations: Most iterations of simpleFoam.
        tolerance: Initial residual of every equation at which it stops earlier; the pressure's is ten times that.
    """

    cell: float = 0.125
    surface_level: int = 3
    box_level: int = 2
    iterations: int = 300
    tolerance: float = 1e-4

    @classmethod
    def tiny(cls) -> Resolution:
        """Some seconds of one core: for tests."""
        return cls(cell=0.24, surface_level=2, box_level=1, iterations=30)


@dataclass(frozen=True)
class Solution:
    """How a case went.

    Attributes:
        converged: Whether the residuals reached the tolerance.
        iterations: Iterations that were made.
        residuals: Last initial residual by field.
        drag_spread: Half of what the drag coefficient still moved by in the last 30 iterations.
        mesh_seconds: Wall-clock time of the mesh.
        solve_seconds: Wall-clock time of simpleFoam.
        solve_cpu_seconds: simpleFoam's own processor time.
    """

    converged: bool
    iterations: int
    residuals: dict[str, float]
    drag_spread: float
    mesh_seconds: float
    solve_seconds: float
    solve_cpu_seconds: float


class CaseError(RuntimeError):
    """A program of OpenFOAM failed; the message names it and its log."""


def missing_programs() -> list[str]:
    """Returns the programs that are not installed: none where a case can be solved."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def _file(path: Path, kind: str, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"FoamFile {{ version 2.0; format ascii; class {kind}; object {path.name}; }}\n"
    path.write_text(header + content)


def write(folder: Path, body: Body, resolution: Resolution) -> None:
    """Writes all files of a case of the family into a folder, which is emptied first."""
    write_around(folder, bodies.triangles(body), body.speed, body.length, bodies.frontal_area(body), resolution)


def write_around(
    folder: Path, surface: NDArray[np.floating], speed: float, length: float, area: float, resolution: Resolution
) -> None:
    """Writes all files of a case around any surface into a folder, which is emptied first.

    Args:
        folder: Where to.
        surface: (T, 3, 3) triangles of a closed surface in the tunnel, in metres.
        speed: Speed of the wind in m/s.
        length: Length of the moments' coefficients in metres.
        area: Area of all coefficients in square metres.
        resolution: How fine, and how long.
    """
    shutil.rmtree(folder, ignore_errors=True)
    bodies.write_stl(surface, _made(folder / "constant" / "triSurface") / "body.stl")
    _write_fields(folder, speed)
    _write_constants(folder)
    _write_mesh(folder, resolution)
    _write_solver(folder, speed, length, area, resolution)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_fields(folder: Path, speed: float) -> None:
    k = 1.5 * (TURBULENCE_INTENSITY * speed) ** 2
    omega = k**0.5 / (0.09**0.25 * TURBULENCE_LENGTH)
    wind = f"({speed:.9g} 0 0)"
    fixed = "type fixedValue; value $internalField;"
    zero_gradient = "type zeroGradient;"
    # By field: class, dimensions, value, and what holds at inlet, outlet, ground and body.
    fields = {
        "U": ("Vector", "0 1 -1 0 0 0 0", wind, fixed, f"type inletOutlet; inletValue uniform (0 0 0); value {wind};",
              fixed, "type noSlip;"),
        "p": ("Scalar", "0 2 -2 0 0 0 0", "0", zero_gradient, fixed, zero_gradient, zero_gradient),
        "k": ("Scalar", "0 2 -2 0 0 0 0", f"{k:.9g}", fixed, zero_gradient, zero_gradient,
              "type kqRWallFunction; value $internalField;"),
        "omega": ("Scalar", "0 0 -1 0 0 0 0", f"{omega:.9g}", fixed, zero_gradient, zero_gradient,
                  "type omegaWallFunction; value $internalField;"),
        "nut": ("Scalar", "0 2 -1 0 0 0 0", f"{k / omega:.9g}", *3 * ("type calculated; value $internalField;",),
                "type nutkWallFunction; value $internalField;"),
    }  # fmt: skip
    for name, (kind, dimensions, value, inlet, outlet, ground, body) in fields.items():
        outlet = outlet.replace(f"value {wind}", "value $internalField")
        _file(
            folder / "0" / name,
            f"vol{kind}Field",
            f"dimensions [{dimensions}];\ninternalField uniform {value};\nboundaryField\n{{\n"
            f"inlet {{ {inlet} }}\noutlet {{ {outlet} }}\nground {{ {ground} }}\nwalls {{ type slip; }}\n"
            f"body {{ {body} }}\n}}\n",
        )


def _write_constants(folder: Path) -> None:
    _file(folder / "constant" / "transportProperties", "dictionary", f"transportModel Newtonian;\nnu {NU};\n")
    _file(
        folder / "constant" / "turbulenceProperties",
        "dictionary",
        "simulationType RAS;\nRAS { RASModel kOmegaSST; turbulence on; printCoeffs off; }\n",
    )


def _write_mesh(folder: Path, resolution: Resolution) -> None:
    (x0, x1), (y0, y1), (z0, z1) = TUNNEL
    counts = [max(round((high - low) / resolution.cell), 1) for low, high in TUNNEL]
    corners = [(x, y, z) for z in (z0, z1) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    _file(
        folder / "system" / "blockMeshDict",
        "dictionary",
        "vertices ({});\n".format(" ".join("({} {} {})".format(*corner) for corner in corners))
        + "blocks (hex (0 1 2 3 4 5 6 7) ({} {} {}) simpleGrading (1 1 1));\n".format(*counts)
        + "boundary\n(\n"
        "inlet { type patch; faces ((0 4 7 3)); }\noutlet { type patch; faces ((1 2 6 5)); }\n"
        "ground { type patch; faces ((0 3 2 1)); }\n"
        "walls { type patch; faces ((0 1 5 4) (2 3 7 6) (4 5 6 7)); }\n);\n",
    )
    low, high = ("({} {} {})".format(*corner) for corner in NEAR_BOX)
    surface, box = resolution.surface_level, resolution.box_level
    _file(
        folder / "system" / "snappyHexMeshDict",
        "dictionary",
        f"""castellatedMesh true; snap true; addLayers false;
geometry
{{
    body.stl {{ type triSurfaceMesh; name body; }}
    near {{ type searchableBox; min {low}; max {high}; }}
}}
castellatedMeshControls
{{
    maxLocalCells 1000000; maxGlobalCells 2000000; minRefinementCells 0; nCellsBetweenLevels 2;
    features (); resolveFeatureAngle 30; allowFreeStandingZoneFaces true;
    locationInMesh (-1.731 0.517 0.913);
    refinementSurfaces {{ body {{ level ({surface} {surface}); patchInfo {{ type wall; }} }} }}
    refinementRegions {{ near {{ mode inside; levels ((1 {box})); }} }}
}}
snapControls
{{
    nSmoothPatch 3; tolerance 2; nSolveIter 30; nRelaxIter 5;
    nFeatureSnapIter 10; implicitFeatureSnap true; explicitFeatureSnap false; multiRegionFeatureSnap false;
}}
addLayersControls {{ layers {{}} relativeSizes true; expansionRatio 1.2; finalLayerThickness 0.3; minThickness 0.1;
    nGrow 0; featureAngle 60; nRelaxIter 3; nSmoothSurfaceNormals 1; nSmoothNormals 3; nSmoothThickness 10;
    maxFaceThicknessRatio 0.5; maxThicknessToMedialRatio 0.3; minMedianAxisAngle 90; nBufferCellsNoExtrude 0;
    nLayerIter 50; }}
meshQualityControls
{{
    maxNonOrtho 65; maxBoundarySkewness 20; maxInternalSkewness 4; maxConcave 80; minVol 1e-13; minTetQuality 1e-15;
    minArea -1; minTwist 0.02; minDeterminant 0.001; minFaceWeight 0.05; minVolRatio 0.01; minTriangleTwist -1;
    nSmoothScale 4; errorReduction 0.75;
}}
mergeTolerance 1e-6;
""",
    )


def _write_solver(folder: Path, speed: float, length: float, area: float, resolution: Resolution) -> None:
    tolerance = resolution.tolerance
    _file(
        folder / "system" / "controlDict",
        "dictionary",
        f"""application simpleFoam; startFrom startTime; startTime 0; stopAt endTime; endTime {resolution.iterations};
deltaT 1; writeControl timeStep; writeInterval {resolution.iterations}; purgeWrite 1;
writeFormat binary; writePrecision 8; timePrecision 6; runTimeModifiable false;
functions
{{
    coefficients
    {{
        type forceCoeffs; libs (forces); patches (body); writeControl timeStep; writeInterval 1; log false;
        rho rhoInf; rhoInf 1; CofR (0 0 0); liftDir (0 0 1); dragDir (1 0 0); pitchAxis (0 1 0);
        magUInf {speed:.9g}; lRef {length:.9g}; Aref {area:.9g};
    }}
    wallShearStress {{ type wallShearStress; libs (fieldFunctionObjects); patches (body); writeControl writeTime; }}
}}
""",
    )
    _file(
        folder / "system" / "fvSchemes",
        "dictionary",
        """ddtSchemes { default steadyState; }
gradSchemes { default Gauss linear; grad(U) cellLimited Gauss linear 1; }
divSchemes
{
    default none; div(phi,U) bounded Gauss linearUpwind grad(U);
    div(phi,k) bounded Gauss upwind; div(phi,omega) bounded Gauss upwind;
    div((nuEff*dev2(T(grad(U))))) Gauss linear;
}
laplacianSchemes { default Gauss linear limited 0.5; }
interpolationSchemes { default linear; }
snGradSchemes { default limited 0.5; }
wallDist { method meshWave; }
""",
    )
    _file(
        folder / "system" / "fvSolution",
        "dictionary",
        f"""solvers
{{
    p {{ solver GAMG; smoother GaussSeidel; tolerance 1e-8; relTol 0.1; }}
    "(U|k|omega)" {{ solver smoothSolver; smoother symGaussSeidel; tolerance 1e-9; relTol 0.1; }}
}}
SIMPLE
{{
    consistent yes; nNonOrthogonalCorrectors 0;
    residualControl {{ p {10 * tolerance:g}; "(U|k|omega)" {tolerance:g}; }}
}}
relaxationFactors {{ equations {{ U 0.9; k 0.7; omega 0.7; }} }}
""",
    )


def solve(folder: Path) -> Solution:
    """Meshes and solves a written case.

    Raises:
        CaseError: A program is missing or failed, or the fields are not finite.
    """
    if missing := missing_programs():
        raise CaseError(f"OpenFOAM's {', '.join(missing)} is not installed: apt-get install openfoam")
    begin = time.monotonic()
    _run(folder, "blockMesh")
    _run(folder, "snappyHexMesh", "-overwrite")
    meshed = time.monotonic()
    log = _run(folder, "simpleFoam")
    seconds = time.monotonic() - meshed
    residuals = {name: float(value) for name, value in re.findall(r"Solving for (\w+), Initial residual = (\S+),", log)}
    iterations = re.findall(r"^Time = (\d+)$", log, re.MULTILINE)
    cpu = re.findall(r"ExecutionTime = (\S+) s", log)
    if not iterations or not residuals or not cpu:
        raise CaseError(f"simpleFoam made no iteration: see {folder / 'log.simpleFoam'}")
    converged = "SIMPLE solution converged" in log
    table = folder / "postProcessing" / "coefficients" / "0" / "coefficient.dat"
    drags = [float(line.split()[1]) for line in table.read_text().splitlines() if not line.startswith("#")][-30:]
    return Solution(
        converged,
        int(iterations[-1]),
        residuals,
        (max(drags) - min(drags)) / 2,
        meshed - begin,
        seconds,
        float(cpu[-1]),
    )


def _run(folder: Path, program: str, *arguments: str) -> str:
    path = folder / f"log.{program}"
    with path.open("w") as log:
        # One core a case: several cases at a time use a machine better than one case on several.
        environment = {"WM_PROJECT_DIR": DEBIAN_PROJECT_DIR, **os.environ, "OMP_NUM_THREADS": "1"}
        status = subprocess.run(
            [program, *arguments], cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    text = path.read_text(errors="replace")
    if status != 0 or "FOAM FATAL" in text:
        raise CaseError(f"{program} failed with status {status}: see {path}")
    return text
