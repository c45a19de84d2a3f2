// Nothing of gloo/common/error.h is needed to call c10d::ProcessGroupGloo; see context.h.
#pragma once
