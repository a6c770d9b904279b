#define KIVI_ISA amx
#define KIVI_NAME "amx"
#define KIVI_AMX
#include "kernels.h"
