// Nothing of gloo/algorithm.h is needed to call c10d::ProcessGroupGloo; see context.h.
#pragma once
