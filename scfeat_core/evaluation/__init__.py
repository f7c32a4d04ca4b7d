"""Measuring features on image pairs with ground truth: the protocol, once, for every method.

**Images** are read as 8-bit RGB and shrunk by the area filter so that their longer side is 640 px (never enlarged;
other sizes by ``--longer-side``); both sides are rounded to whole pixels. Ground truth follows by the pixel-centre
convention: a resize by ``s`` takes x to ``(x + 0.5) s - 0.5``, separately along x and y, for homographies (``S1 H
S0^-1``) and for intrinsics (``S K``) alike. All errors are in pixels of the resized images.

**Features**: the best 1024 by score (other budgets by ``--max-keypoints``). Of several budgets in one run the largest
is extracted and cut to its best, which gives what each gives alone, except for ORB, which is run for each. SIFT is
``cv2.SIFT`` with contrastThreshold 0.005 and no limit of its own, ORB is ``cv2.ORB`` with fastThreshold 5 and nfeatures
2048 (it shares its budget out over the octaves before it ranks them), AKAZE has threshold 1e-4; each is then cut to the
strongest responses. They see OpenCV's gray of the resized colours.

**Matches** are mutual nearest neighbours (Euclidean, or Hamming for binary descriptors), without a ratio test.

**Homography** (``oxford_*``, ``churchill``: image 1 to images 2..6; ``homogr_pairs``: 1 to 2; mean over all pairs):

* MMA@t: share of the matches of a pair whose point of image 1, warped, is at most t px from its match; 0 without any.
  MMAscore is ``sum_{t=1..10} (2 - t/10) MMA@t / 14.5``.
* repeatability@t: the share of the points that have a point of the other image within t px, over those points of both
  images whose warp is inside the other image; distances are taken in the image that the point is warped into.
* AUC@t: of the corner error, the mean distance between the four corners (0, 0) ... (w-1, h-1) of image 1 under the
  estimated and under the true homography; no estimate counts as infinitely wrong. The estimate is USAC_MAGSAC at 1 px,
  at most 10,000 iterations, confidence 0.9999.

**Pose** (mean over the sets, each with the weight of one, however many pairs it has):

* the error of a pair is the larger of the angle of rotation between the estimated and the true R, and of the angle
  between the directions of t; no estimate counts as 180 degrees.
* the essential matrix is by poselib's LO-RANSAC, at most 10,000 iterations, at 1 and at 2 px, and each AUC of each
  set counts the better of the two, run by run; USAC_MAGSAC is the other estimator.
* also reported: the share of the matches of a pair that are within 1 and 3 px of the true epipolar line (the mean of
  both directions), which no random draw disturbs.

**HPatches** (``hpatches``: image 1 to images 2..6 of 108 sequences, image size as stored) is the protocol of D2-Net,
with the above definition of MMA; see :mod:`scfeat_core.evaluation.hpatches`. Budget 8192, or all that a feature file
has. Its published results are read from cache files by an unpickler that runs no code.

**AUC@t** is the area under the curve of the share of pairs with at most a given error, from 0 to t, over t. As
SuperGlue's evaluation code has it, the curve joins the points (0, 0), (e_1, 1/n), (e_2, 2/n) ... by straight lines and
stays level from the last error below t.

**Runs**: RANSAC decides a few pairs by luck, above all the 8 of ``scannet_pairs``: with the matches in another order
the pose AUC@5 of SIFT is between 53.3 and 55.8, that of ORB between 33.3 and 36.7. The estimators are deterministic, so
one run gives the same figures again; but to compare methods that are near each other use ``--runs 4``, which makes
every AUC the mean over 4 orders of the matches.
"""
